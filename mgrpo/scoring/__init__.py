"""Whether an answer is right: rules, a judge where no rule decides, and scores of a sub-agent's report."""
