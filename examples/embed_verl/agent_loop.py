"""A team as an agent loop of verl: a planner asks up to three questions, a searcher answers each, the planner ends.

One policy plays both roles. Every output says whose trajectory it is; verl keeps the rest.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop import AgentLoopBase, AgentLoopOutput

from mgrpo.integrations.verl import row

QUESTIONS = 3
PLAN = "Write up to three questions, one a line, whose answers you need for this task: "
FOUND = "\n\nAnswers:\n{}\n\nNow solve the task.\n"


class Team(AgentLoopBase):
    """The agent loop `mgrpo_team` of agent_loops.yaml."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> list[AgentLoopOutput]:
        """The searcher's trajectories and then the planner's, since verl takes a rollout's reward from its last."""
        task = kwargs["raw_prompt"][-1]["content"]
        prompt = await self.ct_build_initial_tokens([{"role": "user", "content": PLAN + task}])
        plan, plan_logprobs = await self.sample(prompt, sampling_params)
        questions = [line for line in self.tokenizer.decode(plan).splitlines() if line.strip()][:QUESTIONS]

        outputs, answers = [], []
        for question in questions:
            asked = await self.ct_build_initial_tokens([{"role": "user", "content": question}])
            tokens, logprobs = await self.sample(asked, sampling_params)
            answers.append(self.tokenizer.decode(tokens))
            outputs.append(output_of(asked, tokens, [1] * len(tokens), logprobs))

        found = self.tokenizer.encode(FOUND.format("\n".join(answers)))
        end, end_logprobs = await self.sample(prompt + plan + found, sampling_params)
        mask = [1] * len(plan) + [0] * len(found) + [1] * len(end)
        logprobs = plan_logprobs + [0.0] * len(found) + end_logprobs
        outputs.append(output_of(prompt, plan + found + end, mask, logprobs))

        solved = float(str(kwargs["reward_model"]["ground_truth"]) in self.tokenizer.decode(end))
        for at, output in enumerate(
            outputs[:-1]
        ):  # a searcher's reward: the team's, and whether it said anything
            own = solved + (0.1 if answers[at].strip() else -0.1)
            output.extra_fields["mgrpo"] = row("searcher", at, reward=own)
        outputs[-1].extra_fields["mgrpo"] = row("main")
        outputs[-1].reward_score = solved
        return outputs

    async def sample(
        self, prompt: list[int], sampling_params: dict[str, Any]
    ) -> tuple[list[int], list[float]]:
        """Tokens and their log-probs (0 where the engine gave none)."""
        said = await self.server_manager.generate(
            request_id=uuid4().hex, prompt_ids=prompt, sampling_params=sampling_params
        )
        return said.token_ids, said.log_probs or [0.0] * len(said.token_ids)


def output_of(
    prompt: list[int], tokens: list[int], mask: list[int], logprobs: list[float]
) -> AgentLoopOutput:
    return AgentLoopOutput(
        prompt_ids=prompt,
        response_ids=tokens,
        response_mask=mask,
        response_logprobs=logprobs,
        num_turns=2,
        metrics={},
        extra_fields={},
    )
