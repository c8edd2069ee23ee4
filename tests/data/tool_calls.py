"""A conversation that calls tools, and chat templates that know them."""


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(content):
    return {"role": "tool", "name": "weather", "content": content}


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": parameters}}


TOOLS = [tool("weather", city={"type": "string", "enum": ["Bern", "Zürich"]}), tool("clock")]
LOOP = [
    user("How warm is it, and how late?"),
    {
        "role": "assistant",
        "reasoning_content": "I should ask.",
        "tool_calls": [call("weather", city="Zürich"), call("clock")],
    },
    result('{"t": "5 °C"}'),
    {"role": "tool", "name": "clock", "content": "7 😀"},
    assistant("It is cold."),
]

TOOLED = (
    "{% if tools %}[tools]{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function.name }}({{ call.function.arguments | tojson }})</call>"
    "{% endfor %}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Marks answers, as transformers' masks of assistant tokens want it."""

QWENISH = """\
{%- set ns = namespace(query=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.query = ns.query + 1 %}{% endfor %}
{%- set seen = namespace(queries=-1) %}
{%- if tools %}{{ '<|im_start|>system\\n<tools>' }}{% for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' %}{% set seen.queries = seen.queries + 1 %}{% endif %}
    {%- if m.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' ~ content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {%- if m.role == 'assistant' and seen.queries == ns.query and (loop.last or m.reasoning_content) %}
        {{- '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}
        {%- if content or not loop.first %}{{ '\\n' }}{% endif %}
        {{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
        {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""As Qwen 3's: thoughts of answers to earlier questions are left out, what tools say in a row is one turn of the user,
and a list of parts says nothing."""
