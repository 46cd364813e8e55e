"""Chat templates after the formats that four families have published, in words of our own.

Each marks what the assistant says, its end-of-turn token included, with `{% generation %}`: what transformers finds by
the marks is what must be learned without them (`plain`).
"""

import re

_TURN_BY_TURN = """
{%- macro told(tools) -%}
{{- 'Functions that may be called:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{%- endmacro -%}
"""

LLAMA_3 = (
    _TURN_BY_TURN
    + """
{{- bos_token }}
{%- set first = messages[0] %}
{%- set system = first['content'] if first['role'] == 'system' else '' %}
{%- set turns = messages[1:] if first['role'] == 'system' else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}
{%- for message in turns %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- generation %}
        {%- if message.tool_calls %}
            {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call a turn') }}{%- endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
        {%- else %}
            {{- message['content'] | trim }}
        {%- endif %}
        {{- '<|eot_id|>' }}
        {%- endgeneration %}
    {%- elif message['role'] == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message['content'] | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if tools and loop.first %}{{- told(tools) + '\\n\\n' }}{%- endif %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
)

QWEN_2 = (
    _TURN_BY_TURN
    + """
{%- set first = messages[0] %}
{{- '<|im_start|>system\\n' + (first['content'] if first['role'] == 'system' else 'You are Qwen.') }}
{%- if tools %}{{- '\\n\\n# Tools\\n\\n<tools>\\n' + told(tools) + '\\n</tools>' }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message['content'] }}
        {%- for own in message.tool_calls or [] %}
            {{- ('\\n' if message['content'] or not loop.first else '') + '<tool_call>\\n' }}
            {{- '{"name": "' + own.function.name + '", "arguments": ' + (own.function.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message['role'] == 'tool' %}
        {%- if messages[loop.index0 - 1]['role'] != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif not (message['role'] == 'system' and loop.first) %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
)

# what was thought before the last question is dropped, and the last answer always has a thought
QWEN_3 = """
{%- set last = namespace(user=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' and loop.index0 > last.user %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# the system's words, and the tools, are written into the last question
MISTRAL = """
{{- bos_token }}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- set last = namespace(user=0) %}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {%- if tools and loop.index0 == last.user %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (system + '\\n\\n' if system and loop.index0 == last.user else '') }}
        {{- message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + (message['content'] | tojson) + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {%- generation %}
        {%- if message.tool_calls is defined and message.tool_calls is not none %}
            {{- '[TOOL_CALLS] [' }}
            {%- for call in message.tool_calls %}
                {%- if call.id | length != 9 %}{{- raise_exception('ids have nine signs') }}{%- endif %}
                {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') }}
            {%- endfor %}
            {{- eos_token }}
        {%- else %}
            {{- ' ' + message['content'] + eos_token }}
        {%- endif %}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

SMOLLM_2 = """
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are SmolLM.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

TEMPLATES = {"llama-3": LLAMA_3, "qwen-2": QWEN_2, "mistral": MISTRAL, "smollm-2": SMOLLM_2}
WORDS = (
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"),
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    "[/TOOL_RESULTS]",
)


def plain(template: str) -> str:
    """The template without its marks."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
