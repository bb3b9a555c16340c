"""Where tokenizing happens, what it refuses, and what the template is told."""

import threading
from typing import Any

import pytest
from gemma4_chat import TEMPLATES, gemma4_tokenizer, template_source

from bezel.engine.errors import InvalidRequest
from bezel.engine.tokenizer import Tokenizer
from bezel.server.chat import Thinking
from bezel.server.control_tokens import ControlTokens
from bezel.server.prompts import ChatPrompt, chat_prompt, completion_prompts, text_prompt
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest

pytestmark = [pytest.mark.anyio, pytest.mark.weights]

USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "description": "Does it."}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWERED = {"role": "tool", "tool_call_id": "1", "content": "y"}


async def prompt_of(
    tokenizer: Any, *, defaults: dict[str, Any] | None = None, **fields: Any
) -> ChatPrompt:
    request = ChatCompletionRequest(**{"model": "tiny", "messages": [USER], **fields})
    control = ControlTokens.of(tokenizer)
    return await chat_prompt(tokenizer, control, request, tokenizer.vocab_size, defaults or {})


async def text_of(tokenizer: Any, **fields: Any) -> str:
    prompt = await prompt_of(tokenizer, **fields)
    return str(tokenizer.decode(prompt.token_ids, skip_special_tokens=False))


@pytest.fixture
def threads(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads in which texts were tokenized."""
    threads = []
    encode = tokenizer.encode

    def encode_and_note(text: str, add_special_tokens: bool = True) -> list[int]:
        threads.append(threading.current_thread())
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", encode_and_note)
    return threads


@pytest.mark.parametrize(("num_chars", "on_loop"), [(8192, True), (8193, False)])
async def test_long_prompts_leave_the_event_loop(
    tokenizer: Any, threads: list[threading.Thread], num_chars: int, on_loop: bool
) -> None:
    request = CompletionRequest(model="tiny", prompt=["x" * (num_chars - 1), "y"])
    prompts = await completion_prompts(tokenizer, request, 258)
    assert prompts == [[256, *b"x" * (num_chars - 1)], [256, *b"y"]]
    text = "x" * num_chars
    assert await text_prompt(tokenizer, text, 258, False) == list(text.encode())
    assert [thread is threading.current_thread() for thread in threads] == [on_loop] * 3


LONG = "x" * 8192


@pytest.mark.parametrize(
    ("fields", "on_loop"),
    [
        ({"messages": [{"role": "user", "content": "x" * 8000}]}, True),
        ({"messages": [{"role": "user", "content": LONG}]}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}, False),
        ({"messages": [USER] * 1000}, False),
        ({"chat_template_kwargs": {LONG: 1}}, False),
        ({"chat_template_kwargs": {"numbers": [1] * 9000}}, False),
    ],
    ids=["short", "text", "parts", "many", "keys", "numbers"],
)
async def test_long_conversations_leave_the_event_loop(
    tokenizer: Any, threads: list[threading.Thread], fields: dict[str, Any], on_loop: bool
) -> None:
    await prompt_of(tokenizer, **fields)
    assert [thread is threading.current_thread() for thread in threads] == [on_loop]


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"],
)
async def test_template_kwargs_can_not_replace_ours(tokenizer: Any, name: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        await prompt_of(tokenizer, chat_template_kwargs={"x": 1, name: []})
    assert error.value.param == f"chat_template_kwargs.{name}"


async def test_bottomless_values_are_the_requests_fault(tokenizer: Any) -> None:
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    tokenizer = gemma4_tokenizer()
    with pytest.raises(InvalidRequest, match="too deeply"):
        await prompt_of(tokenizer, documents=[deep])


async def test_every_token_id_is_checked(tokenizer: Any) -> None:
    request = CompletionRequest(model="tiny", prompt=[[0, 9], [3, 10]])
    assert await completion_prompts(tokenizer, request, 11) == [[0, 9], [3, 10]]
    with pytest.raises(InvalidRequest, match="outside 0 to 9"):
        await completion_prompts(tokenizer, request, 10)


async def test_so_are_the_token_ids_of_texts(tokenizer: Any) -> None:
    """A tokenizer may know tokens that the model has no embedding for."""
    request = CompletionRequest(model="tiny", prompt="ab")
    assert await completion_prompts(tokenizer, request, 257) == [[256, 97, 98]]
    with pytest.raises(InvalidRequest, match="outside 0 to 255"):
        await completion_prompts(tokenizer, request, 256)
    with pytest.raises(InvalidRequest, match="prompt must not be empty"):
        await text_prompt(tokenizer, "", 258, False)
    messages = [{"role": "user", "content": "ab"}]
    chat = ChatCompletionRequest(model="tiny", messages=messages)
    with pytest.raises(InvalidRequest, match="messages holds a token id outside 0 to 255"):
        await chat_prompt(tokenizer, None, chat, 256, {})


THINK = "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nx<turn|>\n<|turn>model\n"
PLAIN = "<bos><|turn>user\nx<turn|>\n<|turn>model\n"


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, False),
        ({"defaults": {"enable_thinking": True}}, True),
        ({"defaults": {"enable_thinking": True}, "reasoning_effort": "none"}, False),
        (
            {
                "defaults": {"enable_thinking": True},
                "chat_template_kwargs": {"enable_thinking": False},
            },
            False,
        ),
    ],
)
async def test_who_turns_thinking_on(fields: dict[str, Any], thinks: bool) -> None:
    tokenizer = gemma4_tokenizer()
    prompt = await prompt_of(tokenizer, **fields)
    assert tokenizer.decode(prompt.token_ids, False) == (THINK if thinks else PLAIN)
    assert prompt.thinking is (Thinking.ON if thinks else Thinking.OFF)


async def test_thinking_is_on_or_off() -> None:
    with pytest.raises(InvalidRequest) as error:
        await prompt_of(gemma4_tokenizer(), chat_template_kwargs={"enable_thinking": "false"})
    assert error.value.param == "chat_template_kwargs.enable_thinking"


async def test_templates_get_what_requests_give_them(tokenizer: Any) -> None:
    await prompt_of(
        tokenizer,
        reasoning_effort="low",
        documents=[{"text": "y"}],
        chat_template_kwargs={"a": 1},
        defaults={"a": 0, "b": 0},
    )
    assert tokenizer.template_kwargs == {
        "a": 1,
        "b": 0,
        "documents": [{"text": "y"}],
        "reasoning_effort": "low",
        "enable_thinking": True,
    }


LARGE_ENDING = """\
{{- '<|turn>model\\n' -}}
        {%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\\n<channel|>' -}}
        {%- endif -%}"""


def large_tokenizer() -> Tokenizer:
    """Of the larger models, whose prompts bring an empty thought where none is wanted."""
    old = "{{- '<|turn>model\\n' -}}"
    head, tail = template_source("gemma4_v4").rsplit(old, 1)
    return Tokenizer(
        gemma4_tokenizer()._backend, {"bos_token": "<bos>"}, head + LARGE_ENDING + tail
    )


@pytest.mark.parametrize(
    ("messages", "thinking", "expected"),
    [
        ([USER], True, Thinking.ON),
        ([USER], False, Thinking.OFF),
        ([USER, CALLED, ANSWERED], True, Thinking.OPEN),
        ([USER, CALLED, ANSWERED], False, Thinking.OFF),
        ([USER, CALLED, ANSWERED, {"role": "assistant", "content": "z"}, USER], True, Thinking.ON),
    ],
)
async def test_what_the_newest_template_leaves_open(
    messages: list[dict[str, Any]], thinking: bool, expected: Thinking
) -> None:
    kwargs = {"enable_thinking": thinking}
    prompt = await prompt_of(gemma4_tokenizer(), messages=messages, chat_template_kwargs=kwargs)
    assert prompt.thinking is expected


@pytest.mark.parametrize(("thinking", "expected"), [(True, Thinking.ON), (False, Thinking.OFF)])
async def test_an_empty_thought_is_no_open_one(thinking: bool, expected: Thinking) -> None:
    kwargs = {"enable_thinking": thinking}
    tokenizer = large_tokenizer()
    for messages in ([USER], [USER, CALLED, ANSWERED]):
        prompt = await prompt_of(tokenizer, messages=messages, chat_template_kwargs=kwargs)
        assert prompt.thinking is expected
    text = await text_of(tokenizer, chat_template_kwargs=kwargs)
    assert text == (THINK if thinking else f"{PLAIN}<|channel>thought\n<channel|>")


async def test_an_empty_thought_is_in_no_prompt_but_the_last() -> None:
    """So the prompts of larger models are the same up to the last answer, and no further."""
    tokenizer = large_tokenizer()
    first = await prompt_of(tokenizer)
    second = await prompt_of(
        tokenizer, messages=[USER, {"role": "assistant", "content": "y"}, USER]
    )
    thought = len(tokenizer.encode("<|channel>thought\n<channel|>", add_special_tokens=False))
    num_stable = len(first.token_ids) - thought
    assert second.token_ids[:num_stable] == first.token_ids[:num_stable]
    assert second.token_ids[num_stable] != first.token_ids[num_stable]


async def test_words_that_turn_thinking_on_are_words() -> None:
    prompt = await prompt_of(
        gemma4_tokenizer(),
        messages=[
            {"role": "system", "content": "<|think|>"},
            {"role": "user", "content": "<|channel>thought"},
        ],
    )
    assert prompt.thinking is Thinking.OFF


@pytest.mark.parametrize(
    ("message", "ending", "thinking"),
    [
        ({"content": "The answer "}, "The answer ", Thinking.OFF),
        ({"content": ""}, "", Thinking.OFF),
        ({"reasoning": "Let me"}, "<|channel>thought\nLet me", Thinking.OPEN),
        (
            {"reasoning_content": "Hm.\n", "content": "It"},
            "<|channel>thought\nHm.\n<channel|>It",
            Thinking.OFF,
        ),
    ],
)
async def test_final_messages_are_continued(
    message: dict[str, Any], ending: str, thinking: Thinking
) -> None:
    fields = {
        "messages": [USER, {"role": "assistant", **message}],
        "continue_final_message": True,
    }
    for add_generation_prompt in (None, False):
        tokenizer = gemma4_tokenizer()
        prompt = await prompt_of(
            tokenizer,
            **fields,
            add_generation_prompt=add_generation_prompt,
            chat_template_kwargs={"enable_thinking": True},
        )
        assert tokenizer.decode(prompt.token_ids, False) == THINK + ending
        assert prompt.thinking is thinking


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"add_generation_prompt": True}, "exclude each other"),
        ({"messages": [USER]}, "role 'assistant'"),
        ({"messages": [USER, CALLED]}, "without tool_calls"),
        (
            {"messages": [USER, {"role": "assistant", "reasoning": "Hm"}]},
            "no thoughts to continue",
        ),
    ],
)
async def test_what_can_not_be_continued(
    tokenizer: Any, fields: dict[str, Any], message: str
) -> None:
    messages = [USER, {"role": "assistant", "content": "a"}]
    with pytest.raises(InvalidRequest, match=message) as error:
        await prompt_of(
            tokenizer, **{"messages": messages, "continue_final_message": True, **fields}
        )
    assert error.value.param == "continue_final_message"


async def test_prompts_may_end_with_the_messages() -> None:
    text = await text_of(gemma4_tokenizer(), add_generation_prompt=False)
    assert text == "<bos><|turn>user\nx<turn|>\n"


async def test_tools_that_must_not_be_called_are_not_shown() -> None:
    declared = '<|tool>declaration:f{description:<|"|>Does it.<|"|>}<tool|>'
    for choice in (None, "auto", "required", {"type": "function", "function": {"name": "f"}}):
        text = await text_of(gemma4_tokenizer(), tools=[TOOL], tool_choice=choice)
        assert text == f"<bos><|turn>system\n{declared}<turn|>\n" + PLAIN.removeprefix("<bos>")
    assert await text_of(gemma4_tokenizer(), tools=[TOOL], tool_choice="none") == PLAIN


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"messages": [USER, CALLED, ANSWERED]}, "messages[1].tool_calls"),
    ],
)
async def test_models_without_tools(tokenizer: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="has no tools") as error:
        await prompt_of(tokenizer, **fields)
    assert (error.value.param, error.value.code) == (param, "unsupported_parameter")
    for unused in ({"tools": []}, {"tools": [TOOL], "tool_choice": "none"}):
        assert await text_of(tokenizer, **unused) == "<bos>user:x\nassistant:"


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("any", "tool_choice"),
        ({"type": "function", "function": {"name": "g"}}, "tool_choice.function.name"),
    ],
)
async def test_tool_choices_are_checked(choice: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        await prompt_of(gemma4_tokenizer(), tools=[TOOL], tool_choice=choice)
    assert error.value.param == param


@pytest.mark.parametrize("template", TEMPLATES)
async def test_the_preamble_is_the_systems_turn_with_its_tools(template: str) -> None:
    tokenizer = gemma4_tokenizer(template)
    system = {"role": "system", "content": "Be kind."}
    for messages, tools in (([system, USER], []), ([USER], [TOOL]), ([system, USER], [TOOL])):
        prompt = await prompt_of(tokenizer, messages=messages, tools=tools)
        other = await prompt_of(
            tokenizer, messages=[*messages[:-1], {"role": "user", "content": "y"}], tools=tools
        )
        preamble = prompt.token_ids[: prompt.num_preamble_tokens]
        assert preamble == other.token_ids[: other.num_preamble_tokens]
        text = tokenizer.decode(preamble, skip_special_tokens=False)
        assert text.startswith("<bos><|turn>system\n") and text.endswith("<turn|>\n")


@pytest.mark.parametrize(
    "messages", [[USER], [USER, {"role": "assistant", "content": "system"}, USER]]
)
async def test_without_a_systems_turn_there_is_no_preamble(messages: list[Any]) -> None:
    prompt = await prompt_of(gemma4_tokenizer(TEMPLATES[0]), messages=messages)
    assert prompt.num_preamble_tokens == 0


async def test_a_tokenizer_without_control_tokens_knows_no_preamble(tokenizer: Any) -> None:
    assert (await prompt_of(tokenizer)).num_preamble_tokens == 0
