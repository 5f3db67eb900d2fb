"""The embedded default task: real facts, real search, two agents that need each other.

    facts -> documents, language        what there is to know, and the words of it
    questions                           what is asked
    decoder                             the architecture of fresh policies
    claims                              what a comparison on it must show
    task                                all of it, with what every such task has (words/), behind a Task's interface
    chat, chat_calls                    the same for pretrained models: the task "atlas-chat"

What the recipe needs (chosen on the validation split):

- SFT: batch 96, AdamW 4e-3 at width 64 and in proportion to 1 / width (words/policy.py says why), betas
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
