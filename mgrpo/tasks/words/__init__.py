"""Teams of small policies over a closed vocabulary: what the tasks "atlas" and "factbook-small" share.

world, documents, search       facts, the documents that tell them, and what a search finds
questions                      chains of relations, drawn and in fixed sets
protocol, play                 what may be said, how a rollout goes
demos, policy, start           the start: demonstrations, fresh policies, are they valid
claims                         what a comparison must show
task                           all of it behind the interface of a Task
"""
