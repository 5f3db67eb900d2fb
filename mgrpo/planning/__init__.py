"""`mgrpo plan`: whether a run fits and what it costs, before anything starts.

fake, live    tensors without data, and how many bytes of them are alive
models, step  a policy from config.json alone; a real training step of it over fake tensors
state         the part that the launcher looks at before every run: arithmetic on the headers of files
traffic, speed, assumptions   bytes and seconds by arithmetic
plan, page    an agent's plan, suggestions computed anew; the page
"""
