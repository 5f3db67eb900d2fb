"""The record of a run: every rollout with what it said, every step with the credit it gave, for people and for replay.

Rollout workers and trainers write, each into a folder of its own on its own server; nothing of it travels through the
store, and nothing in training reads it.
"""
