"""The embedded default task: real facts, real search, two agents that need each other.

    facts -> documents -> search        what there is to know, and the tools
    questions, protocol, play           what is asked, what may be said, how a rollout goes
    demos, decoder, policy, start       the start: demonstrations, fresh policies, are they valid
    claims                              what a comparison on it must show
    task                                all of it behind the interface of a Task

What the recipe needs (chosen on the validation split):

- SFT: batch 96, AdamW 4e-3 at width 64 and in proportion to 1 / width (policy.py says why), betas
  .9/.98, 30 warm-up steps, linear decay over the last 40 %; 1400 steps for the sub, 700 to 1000 for the
  main. A shorter one may miss the start validation's copy bound of .97 for the sub (1000 steps: .945 to 1.0 by seed and
  machine; 700: .95 to .97, 500: .91).
- RL: 16 questions x 8 rollouts, two minibatches a step, Adam 1e-3, betas .9/.95, clip .2/.28, token
  mean, D_max 3. The paper's rewards: main .1 format + .9 correct, sub .1 format + .4 outcome + .5 expert,
  0 for an invalid format. Validation passes .85 sampled and .90 greedy between steps 25 and 60, then sampled
  rises slowly.
- A plateau near .15 in validation (training shows .3 to .6) means that the sub has learned by heart
  which training names are worth opening: its attention was saturated by SFT (docs/results.md).
"""
