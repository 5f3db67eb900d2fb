"""`mgrpo compare`: co-training beside its rivals and controls, from runs to a table one can argue with.

variants.py  what is compared, as overrides of one config
jobs.py      the runs: side by side, resumed, sharing their start policies
spent.py     what is held equal: rollouts and tokens of each variant; and its named evaluation sets
scores.py    the held-out score of every variant, question by question
shuffled.py  a control: rewards permuted within each group
verdict.py   means, spreads, paired intervals, table and picture; the claims about them are the task's
"""
