"""Chat templates with the grammars of public model families, in our own words: who stands where, what ends a turn, how
a tool's result follows its call. What a model's own template says at length (dates, advice, formats) is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """One family. said: how the policy writes a turn behind the generation prompt, around its words. stop: the token
    that it ends a turn with, by the role that speaks next ("" for any). written: what the template writes for it."""

    name: str
    template: str | dict[str, str]
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    eos: str = ""
    bos: str | None = None
    stops: tuple[str, ...] = ()  # of its generation config
    said: str = "{}"
    stop: str | dict[str, str] = ""
    written: str = ""
    dropped: str = ""  # an opening of thoughts that the template leaves out of old turns
    strip: bool = False  # control tokens take in the white space to their right

    def tokenizer(self) -> Any:
        """A byte-level BPE with the family's tokens and template, and its generation config's stops."""
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        text = [
            "the capital of Fiji is Suva and the user says so",
            "assistant system user tool result think",
        ] * 3
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token=self.eos,
            clean_up_tokenization_spaces=False,
            **({"bos_token": self.bos} if self.bos else {}),
        )
        rest = [t for t in self.special if t not in (self.eos, self.bos)]
        made.add_tokens(
            [AddedToken(t, special=True, normalized=False, rstrip=self.strip) for t in rest],
            special_tokens=True,
        )
        made.add_tokens([AddedToken(t, special=False, normalized=False) for t in self.plain])
        made.chat_template = self.template
        made.generation_stops = tuple(made.convert_tokens_to_ids(list(self.stops)))
        return made

    def turn(self, words: str, following: str) -> str:
        """What the policy samples when it says `words` and the role `following` speaks next."""
        stop = self.stop if isinstance(self.stop, str) else self.stop.get(following, self.stop[""])
        return self.said.format(words) + stop


_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

_CALLS = (
    "{% for c in m.tool_calls %}{% set c = c.function or c %}"
    "{{ ('\n' if m.content or not loop.first or %FIRST% else '') + '<tool_call>\n{\"name\": \"' + c.name + "
    "'\", \"arguments\": ' }}{{ c.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
)
_TOOL_IN_USER_TURN = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
)
_SYSTEM_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
    "{% endif %}# Tools\n{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}"
    "Call as <tool_call>{...}</tool_call>.{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
)

QWEN25 = Family(
    "Qwen2.5",
    _SYSTEM_WITH_TOOLS
    + "{% else %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    + "{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' "
    "and not m.tool_calls) %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    + _CALLS.replace("%FIRST%", "true")
    + "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    + _TOOL_IN_USER_TURN
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    _IM,
    _QWEN_PLAIN,
    eos="<|im_end|>",
    stops=("<|im_end|>", "<|endoftext|>"),
    stop="<|im_end|>",
)

QWEN3 = Family(
    "Qwen3",
    _SYSTEM_WITH_TOOLS + "{% endif %}{% set ns = namespace(open=true, query=messages | length - 1) %}"
    "{% for m in messages[::-1] %}{% set i = messages | length - 1 - loop.index0 %}"
    "{% if ns.open and m.role == 'user' and not (m.content.startswith('<tool_response>') and "
    "m.content.endswith('</tool_response>')) %}{% set ns.open = false %}{% set ns.query = i %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set thoughts = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if '</think>' in content %}{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.query and (loop.last or thoughts) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}"
    + _CALLS.replace("%FIRST%", "false")
    + "{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}" + _TOOL_IN_USER_TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    _IM,
    _QWEN_PLAIN,
    eos="<|im_end|>",
    stops=("<|im_end|>", "<|endoftext|>"),
    stop="<|im_end|>",
)

LLAMA3 = Family(
    "Llama 3.1",
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}"
    "{{ system + '<|eot_id|>' }}{% if tools %}{% set first = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{{ '<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n' }}"
    "{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{{ first + '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call a turn') }}{% endif %}{% set c = m.tool_calls[0].function %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    '{{ \'{"name": "\' + c.name + \'", "parameters": \' }}{{ c.arguments | tojson }}{{ "}<|eot_id|>" }}'
    "{% elif m.role in ('tool', 'ipython') %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|eot_id|>' }}{% else %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eom_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    eos="<|eot_id|>",
    bos="<|begin_of_text|>",
    stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    stop={"": "<|eot_id|>", "ipython": "<|eom_id|>"},
    written="<|eot_id|>",
)

_GEMMA_TURNS = (
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') + "
    "m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA2 = Family(
    "Gemma 2",
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set turns = messages %}{% set first = '' %}" + _GEMMA_TURNS,
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    ("<table>", "\n\n"),
    eos="<eos>",
    bos="<bos>",
    stops=("<eos>", "<end_of_turn>"),
    stop="<end_of_turn>",
)
GEMMA3 = Family(
    "Gemma 3",
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    + _GEMMA_TURNS,
    GEMMA2.special,
    GEMMA2.plain,
    eos="<eos>",
    bos="<bos>",
    stops=("<eos>", "<end_of_turn>"),
    stop="<end_of_turn>",
)

PHI3 = Family(
    "Phi-3",
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    eos="<|endoftext|>",
    stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    stop="<|end|>",
    strip=True,
)

MISTRAL = Family(
    "Mistral 7B v0.3",
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
    "{% set users = turns | selectattr('role', 'equalto', 'user') | list %}"
    "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}{% if tools and m == users[-1] %}"
    "{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('call ids have 9 characters') }}{% endif %}"
    '{{ c.function | tojson }}{{ \', "id": "\' + c.id + \'"}\' }}'
    '{{ "]" + eos_token if loop.last else ", " }}{% endfor %}'
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('call ids have 9 characters') }}{% endif %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
     "[/TOOL_RESULTS]"),
    eos="</s>",
    bos="<s>",
    stops=("</s>",),
    said=" {}",
    stop="</s>",
)  # fmt: skip

_COHERE = (
    "{{ bos_token }}{% if messages[0].role == 'system' or tools %}"
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "%TOOLS%<|END_OF_TURN_TOKEN|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}%RESULTS%"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
COHERE = Family(
    "Command R",
    {
        "default": _COHERE.replace("%TOOLS%", "").replace("%RESULTS%", "").replace(" or tools", ""),
        "tool_use": _COHERE.replace(
            "%TOOLS%", "{% if tools %}{{ '\n## Available Tools\n' }}{{ tools | tojson }}{% endif %}"
        ).replace(
            "%RESULTS%",
            "{% elif m.role == 'tool' %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>\n' + m.content + "
            "'</results><|END_OF_TURN_TOKEN|>' }}",
        ),
    },
    ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
     "<|CHATBOT_TOKEN|>"),
    eos="<|END_OF_TURN_TOKEN|>",
    bos="<BOS_TOKEN>",
    stops=("<|END_OF_TURN_TOKEN|>",),
    stop="<|END_OF_TURN_TOKEN|>",
)  # fmt: skip

GLM4 = Family(
    "GLM-4",
    "[gMASK]<sop>{% if tools %}{{ '<|system|>\n# Tools\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content }}"
    "{% elif m.role == 'system' %}{{ '<|system|>\n' + m.content }}"
    "{% elif m.role in ('tool', 'observation') %}{{ '<|observation|>\n' + m.content }}"
    "{% elif m.role == 'assistant' %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<|assistant|>' + c.function.name + '\n' }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ '<|assistant|>\n' + m.content }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    eos="<|endoftext|>",
    stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
    said="\n{}",
    stop={"user": "<|user|>", "": "<|observation|>"},
)

_DEEPSEEK = (
    "{% set ns = namespace(tool=false, first=true, system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = ns.system + m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.tool = false %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}{% set ns.tool = false %}{% for c in m.tool_calls %}"
    "{{ ('<｜Assistant｜><｜tool▁calls▁begin｜>' if loop.first else '\n') + "
    "'<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + "
    "c.function.name + '\n' }}{{ c.function.arguments | tojson }}{{ '<｜tool▁call▁end｜>' }}{% endfor %}"
    "{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}"
    "{% elif m.role == 'assistant' %}{% set said = %SAID% %}"
    "{{ ('<｜tool▁outputs▁end｜>' if ns.tool else '<｜Assistant｜>') + said + '<｜end▁of▁sentence｜>' }}"
    "{% set ns.tool = false %}{% elif m.role == 'tool' %}"
    "{{ ('\n' if ns.tool else '<｜tool▁outputs▁begin｜>') + '<｜tool▁output▁begin｜>' + m.content + "
    "'<｜tool▁output▁end｜>' }}{% set ns.tool = true %}{% endif %}{% endfor %}"
    "{% if ns.tool %}<｜tool▁outputs▁end｜>{% elif add_generation_prompt %}{{ '<｜Assistant｜>%OPENING%' }}{% endif %}"
)
_DEEPSEEK_TOKENS = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
DEEPSEEK_V3 = Family(
    "DeepSeek-V3",
    _DEEPSEEK.replace("%SAID%", "m.content").replace("%OPENING%", ""),
    _DEEPSEEK_TOKENS,
    eos="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
    stops=("<｜end▁of▁sentence｜>",),
    stop="<｜end▁of▁sentence｜>",
)
DEEPSEEK_R1 = Family(
    "DeepSeek-R1",
    _DEEPSEEK.replace("%SAID%", "m.content.split('</think>')[-1]").replace("%OPENING%", "<think>\\n"),
    _DEEPSEEK_TOKENS,
    ("<think>", "</think>"),
    eos="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
    stops=("<｜end▁of▁sentence｜>",),
    stop="<｜end▁of▁sentence｜>",
    dropped="<think>\n",
)

GPT_OSS = Family(
    "gpt-oss",
    "{{ '<|start|>system<|message|>Reasoning: medium<|end|>' }}"
    "{% set lead = messages[0].content if messages[0].role in ('developer', 'system') else '' %}"
    "{% set turns = messages[1:] if messages[0].role in ('developer', 'system') else messages %}"
    "{% if lead or tools %}{{ '<|start|>developer<|message|>' }}{% if lead %}"
    "{{ '# Instructions\n\n' + lead }}{% endif %}"
    "{% if tools %}{{ '\n\n# Tools\n\nnamespace functions {\n' }}{% for t in tools %}"
    "{{ 'type ' + t.function.name + ' = (_: {' }}{% for key, p in t.function.parameters.properties.items() %}"
    "{{ key + ': ' + ('string' if p.type == 'string' else 'any') }}{% endfor %}{{ '}) => any;\n' }}{% endfor %}}"
    "{% endif %}{{ '<|end|>' }}{% endif %}{% set ns = namespace(call='') %}{% for m in turns %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{% set c = m.tool_calls[0].function %}{% set ns.call = c.name %}"
    "{% if m.content %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant to=functions.' + c.name + '<|channel|>commentary json<|message|>' }}"
    "{{ c.arguments | tojson }}{{ '<|call|>' }}"
    "{% elif m.role == 'assistant' %}{% set ns.call = '' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% elif m.role == 'tool' %}{% if not ns.call %}{{ raise_exception('a tool message needs a tool call before it') }}"
    "{% endif %}{{ '<|start|>functions.' + ns.call + ' to=assistant<|channel|>commentary<|message|>' }}"
    "{{ m.content | tojson }}{{ '<|end|>' }}"
    "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>"),
    eos="<|return|>",
    stops=("<|return|>", "<|endoftext|>", "<|call|>"),
    said="<|channel|>final<|message|>{}",
    stop="<|return|>",
    written="<|end|>",
)

MINIMAX = Family(
    "MiniMax-M2",
    "{% set ns = namespace(call='') %}{{ ']~!b[]~b]system\n' }}"
    "{{ messages[0].content if messages[0].role == 'system' else 'Be helpful.' }}"
    "{% if tools %}{{ '\n\n# Tools\n' }}{% for t in tools %}{{ '<tool>' }}{{ t.function | tojson }}{{ '</tool>\n' }}"
    "{% endfor %}{% endif %}{{ '[e~[\n' }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ ']~b]ai\n' + m.content }}{% if m.tool_calls %}{{ '\n<minimax:tool_call>\n' }}{% for c in m.tool_calls %}"
    "{% set ns.call = c.function.name %}{{ '<invoke name=\"' + c.function.name + '\">\n' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<parameter name=\"' + k + '\">' + v + '</parameter>\n' }}"
    "{% endfor %}{{ '</invoke>\n' }}{% endfor %}{{ '</minimax:tool_call>' }}{% else %}{% set ns.call = '' %}{% endif %}"
    "{{ '[e~[\n' }}{% elif m.role == 'tool' %}{% if not ns.call %}"
    "{{ raise_exception('a tool message needs an assistant message with a tool call before it') }}{% endif %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}]~b]tool{% endif %}"
    "{{ '\n<response>' + m.content + '</response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '[e~[\n' }}{% endif %}"
    "{% elif m.role == 'user' %}{{ ']~b]user\n' + m.content + '[e~[\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ']~b]ai\n' }}{% endif %}",
    ("]~!b[", "]~b]", "[e~["),
    ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"),
    eos="[e~[",
    stops=("[e~[",),
    stop="[e~[",
)

LFM2 = Family(
    "LFM2",
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% if system or tools %}{{ '<|im_start|>system\n' + system }}{% if tools %}"
    "{{ '\nList of tools: <|tool_list_start|>' }}{{ tools | tojson }}{{ '<|tool_list_end|>' }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in turns %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'tool' %}{{ '<|tool_response_start|>' + m.content + '<|tool_response_end|>' }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|startoftext|>", *_IM, "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_response_start|>",
     "<|tool_response_end|>", "<|tool_call_start|>", "<|tool_call_end|>"),
    eos="<|im_end|>",
    bos="<|startoftext|>",
    stops=("<|im_end|>",),
    stop="<|im_end|>",
)  # fmt: skip

_HERMES = (
    "{{ bos_token }}%TOOLS%{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>tool\n' }}{% endif %}"
    "{{ '<tool_response>\n' + m.content + '\n</tool_response>\n' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HERMES = Family(
    "Hermes 2 Pro",
    {
        "default": _HERMES.replace("%TOOLS%", ""),
        "tool_use": _HERMES.replace(
            "%TOOLS%",
            "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{{ tools | tojson }}"
            "{{ '</tools><|im_end|>\n' }}{% endif %}",
        ),
    },
    ("<|begin_of_text|>", *_IM),
    ("<tool_call>", "</tool_call>", "<tools>", "</tools>"),
    eos="<|im_end|>",
    bos="<|begin_of_text|>",
    stops=("<|im_end|>",),
    stop="<|im_end|>",
)

FAMILIES = (QWEN25, QWEN3, LLAMA3, GEMMA2, GEMMA3, PHI3, MISTRAL, COHERE, GLM4, DEEPSEEK_V3, DEEPSEEK_R1, GPT_OSS,
            MINIMAX, LFM2, HERMES)  # fmt: skip
