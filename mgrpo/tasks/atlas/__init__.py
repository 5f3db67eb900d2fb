"""The embedded default task: real facts, real search, two agents that need each other.

    facts -> documents -> search        what there is to know, and the tools
    questions, protocol, play           what is asked, what may be said, how a rollout goes
    demos, policy, gate                 the start: demonstrations, fresh policies, are they valid
    task                                all of it behind the interface of a Task

What the recipe needs (chosen on the validation split):

- Warm start: batch 96, AdamW 4e-3, betas .9/.98, 30 warm-up steps, linear decay over the last 40 %;
  1400 steps for the sub, 700 to 1000 for the main. A shorter one may miss the gate's copy bound of .97
  for the sub (1000 steps: .945 to 1.0 by seed and machine; 700: .95 to .97, 500: .91).
- Width 64. With 96 the sub copies .995 to 1.0 after 1100 steps, but co-training then stalls: .26 sampled
  and .37 greedy held-out on three seeds of three, while a shared policy reached .82 and .95.
- RL: 16 questions x 8 rollouts, two minibatches a step, Adam 1e-3, betas .9/.95, clip .2/.28, token
  mean, D_max 3. Main reward .1 format + .9 correct, sub reward .1 format + .5 outcome + .4 expert.
  Validation passes .85 sampled and .90 greedy between steps 40 and 60, then sampled rises slowly.
- A plateau near .15 in validation (training shows .3 to .5) means that the sub has learned by heart
  which training names are worth opening. It was seen for one start of eight, with four heads.
"""
