"""The embedded default task: real facts, real search, two agents that need each other.

    facts -> documents -> search        what there is to know, and the tools
    questions, protocol, play           what is asked, what may be said, how a rollout goes
    demos, policy, gate                 the start: demonstrations, fresh policies, are they valid
    task                                all of it behind the interface of a Task

What the recipe needs (chosen on the validation split):

- Warm start: batch 96, AdamW 4e-3, betas .9/.98, 30 warm-up steps, linear decay over the last 40 %;
  1100 steps for the sub, 700 to 1000 for the main: the sub copies .995 to 1.0 at width 96 (seeds 2 to 5).
  Fewer steps miss the gate's bound of .97 (800: .94), and so does width 64 for some seeds and machines
  (1000 steps: .945 to .99), width 80 for some seeds (1100: .955 to 1.0).
- RL: 16 questions x 8 rollouts, two minibatches a step, Adam 1e-3, betas .9/.95, clip .2/.28, token
  mean, D_max 3. Main reward .1 format + .9 correct, sub reward .1 format + .5 outcome + .4 expert.
  Validation passes .85 sampled and .90 greedy between steps 40 and 60, then sampled rises slowly.
- A plateau near .15 in validation (training shows .3 to .5) means that the sub has learned by heart
  which training names are worth opening. It was seen for one start of eight, with four heads.
"""
