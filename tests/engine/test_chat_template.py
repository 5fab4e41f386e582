"""Chat templates render what transformers renders, and hostile ones end in an error."""

from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from plait.engine import chat_template as module
from plait.engine.chat_template import ChatTemplate, ControlTokens
from plait.errors import BadRequest, BadSetup

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA_3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set role = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}
{% set content = role + message['content'] | trim %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LLAMA_3_TOOLS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" + system_message }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

HERMES = """{%- macro json_type(spec) %}
    {{- spec.type if spec.type is string else spec.type | join('|') }}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
        {%- for name, spec in tool.function.parameters.properties.items() %}
            {{- '\n  ' ~ name ~ ': ' ~ json_type(spec) }}
        {%- endfor %}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'assistant' and message.reasoning_content and loop.index0 > ns.last_query_index %}
        {{- '<think>' + message.reasoning_content.strip('\n') + '</think>' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content %}{{- '\n' + message.content.split('</think>')[-1].lstrip('\n') }}{%- endif %}
    {%- for tool_call in message.tool_calls or [] %}
        {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
        {{- '\n<tool_call>\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
        {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}
        {{- ' ' + message['content'] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}"""

WHITESPACE = """
  {% for message in messages %}
    {% if loop.index > 3 %}
      {% break %}
    {% endif %}
    {# a comment #}
    {{ message.content }}
        {%+ if true %} x {% endif %}
    {% generation %}
    {{ loop.length }}|{{ dict(a=1).items() | list }}|{{ namespace(self=1, b=2).b }}|{{ range(3) | list }}
    {% endgeneration %}
  {% endfor %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama_3": LLAMA_3,
    "llama_3_tools": LLAMA_3_TOOLS,
    "hermes": HERMES,
    "mistral": MISTRAL,
    "whitespace": WHITESPACE,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter für <b>Städte</b> & 'Dörfer'",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": ["integer", "null"]}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
PLAIN = [
    {"role": "user", "content": "  Hallo <b>Welt</b>!\n"},
    {"role": "assistant", "content": "Ja?"},
    {"role": "user", "content": "你好 & 'x' \"y\"\n"},
]
CONVERSATIONS = {
    "plain": PLAIN,
    "system": [{"role": "system", "content": " Be brief. "}, *PLAIN],
    "tools": [
        {"role": "user", "content": "Wetter?"},
        {"role": "assistant", "content": "", "reasoning_content": "\nhm\n", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
        {"role": "tool", "content": "sun", "tool_call_id": "2"},
        {"role": "assistant", "content": "<think>so</think>\nwet"},
    ],
    "roles": [{"role": "assistant", "content": "first"}, *PLAIN, {"role": "user", "content": "again"}],
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def theirs(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=source, **options)
    return rendered[0]


@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers(name: str, conversation: str, with_tools: bool) -> None:
    messages, tools = CONVERSATIONS[conversation], TOOLS if with_tools else None
    template = ChatTemplate(TEMPLATES[name], name)
    for options in ({}, {"enable_thinking": False, "date_string": "1 Jan 2026"}):
        variables = {**VARIABLES, **options}
        for prompted in (True, False):
            try:
                expected = theirs(
                    TEMPLATES[name], messages, tools=tools, add_generation_prompt=prompted, **variables
                )
            except Exception as error:
                with pytest.raises(BadRequest, match="refuses this conversation") as caught:
                    template.render(
                        messages, tools=tools, add_generation_prompt=prompted, variables=variables
                    )
                assert str(error) in caught.value.message
                continue
            got = template.render(messages, tools=tools, add_generation_prompt=prompted, variables=variables)
            assert got == expected


@pytest.mark.parametrize("name", ["chatml", "llama_3", "hermes"])
def test_continuing_the_last_message_equals_transformers(name: str) -> None:
    for last in ("Once upon", "with a space ", "  both  "):
        messages = [*PLAIN[:1], {"role": "assistant", "content": last}]
        options = {"continue_final_message": True, "add_generation_prompt": False}
        expected = theirs(TEMPLATES[name], messages, **options, **VARIABLES)
        got = ChatTemplate(TEMPLATES[name], name).render(messages, **options, variables=VARIABLES)
        assert got == expected
        assert got.endswith((last, last.strip()))


def test_continuing_needs_a_last_text_and_excludes_a_generation_prompt() -> None:
    template = ChatTemplate(CHATML, "chatml")
    with pytest.raises(BadRequest, match="exclude each other"):
        template.render(PLAIN, continue_final_message=True)
    empty = [{"role": "assistant", "tool_calls": [CALL]}]
    with pytest.raises(BadRequest, match="text in the last message"):
        template.render(empty, continue_final_message=True, add_generation_prompt=False)
    swallowing = ChatTemplate("{{ messages[0].content }}", "swallowing")
    with pytest.raises(BadRequest, match="cannot be continued"):
        swallowing.render(PLAIN, continue_final_message=True, add_generation_prompt=False)


PARTS_READER = """{% for message in messages %}[{{ message.role }}]{% if message.content is string %}
{{- message.content }}{% else %}{% for part in message.content %}{{- part.text }}{% endfor %}{% endif %}
{%- endfor %}"""
PARTS_ONLY = """{% for message in messages %}{% for part in message.content %}
{{- part['text'] + ';' }}{% endfor %}{% endfor %}"""
ARGUMENTS_ONLY = """{% for message in messages %}{% for call in message.tool_calls or [] %}
{{- '!' + call.function.arguments }}{% endfor %}{% endfor %}"""


def test_text_parts_reach_each_template_in_the_form_it_reads() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    of_parts = [{"role": "user", "content": parts}, {"role": "assistant", "content": "three"}]
    strings = ChatTemplate(CHATML, "strings").render(of_parts, add_generation_prompt=False)
    assert strings == "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>\n"
    assert ChatTemplate(PARTS_READER, "both").render(of_parts) == "[user]onetwo[assistant]three"
    assert ChatTemplate(PARTS_ONLY, "parts").render(of_parts) == "one;two;three;"


def test_content_that_is_no_text_is_refused_by_its_type() -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    with pytest.raises(BadRequest, match="image_url") as caught:
        ChatTemplate(CHATML, "chatml").render(image)
    assert caught.value.param == "messages"


def test_tool_call_arguments_reach_each_template_in_the_form_it_reads() -> None:
    call = {"function": {"name": "f", "arguments": '{"city": "Köln"}'}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert '"arguments": {"city": "Köln"}}' in ChatTemplate(HERMES, "objects").render(messages)
    assert ChatTemplate(ARGUMENTS_ONLY, "strings").render(messages) == '!{"city": "Köln"}'


def test_absent_values_are_missing_keys_and_reasoning_has_all_its_names() -> None:
    template = ChatTemplate(
        "{{ 'content' in messages[0] }}{{ messages[0].thinking }}{{ messages[0].reasoning_content }}", "t"
    )
    assert template.render([{"role": "user", "content": None, "reasoning": "r"}]) == "Falserr"


def test_objects_with_methods_never_reach_a_template() -> None:
    class Sneaky:
        def save(self) -> str:
            return "written"

    template = ChatTemplate("{{ messages[0].extra }}", "t")
    assert template.render([{"role": "user", "content": "a", "extra": Sneaky()}]) == "<Sneaky>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ raise_exception('no') }}",
        "{{ undefined_thing.attribute }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ [1].pop(99) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_what_a_template_may_not_do_is_a_bad_request(source: str) -> None:
    with pytest.raises(BadRequest, match="refuses this conversation"):
        ChatTemplate(source, "hostile").render(PLAIN)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ [1] * 10**9 }}",
        "{{ 10 ** 10**9 }}",
        "{% set ns = namespace(s='xxxx') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ range(10**12) | list }}",
    ],
)
def test_a_template_that_never_ends_is_stopped(source: str) -> None:
    with pytest.raises(BadRequest):
        ChatTemplate(source, "hostile").render(PLAIN)


def test_a_template_that_is_not_jinja_is_bad_setup_with_its_origin() -> None:
    with pytest.raises(BadSetup, match=r"somewhere\.jinja"):
        ChatTemplate("{% for %}", "somewhere.jinja")


def test_variables_cannot_replace_the_conversation() -> None:
    template = ChatTemplate(CHATML, "chatml")
    with pytest.raises(BadRequest, match="'messages'"):
        template.render(PLAIN, variables={"messages": []})
    with pytest.raises(BadRequest, match="at least one message"):
        template.render([])


def test_marks_wrap_control_tokens_everywhere_and_cannot_be_forged() -> None:
    control = ControlTokens(("<|end|>", "<|end|>x", "<s>"))
    forged = f"a{module.MARK_START}<|end|>xb"
    marked = control.mark({"role": "user", "content": [forged, 3, None], "<s>": ("<s>",)})
    start, end = module.MARK_START, module.MARK_END
    assert marked == {
        "role": "user",
        "content": [f"a{start}<|end|>x{end}b", 3, None],
        f"{start}<s>{end}": [f"{start}<s>{end}"],
    }
    assert control.pieces(f"<s>a{start}<|end|>{end}b{start}c") == [
        ("<s>a", False),
        ("<|end|>", True),
        ("b", False),
        ("c", False),
    ]
    assert ControlTokens(()).mark("<s>") == "<s>"


def test_the_sandbox_error_of_jinja_is_the_one_raised() -> None:
    with pytest.raises(BadRequest) as caught:
        ChatTemplate("{{ ''.__class__.__mro__ }}", "hostile").render(PLAIN)
    assert isinstance(caught.value.__cause__, SecurityError)
