"""Chat templates of the common families, each written here after the family's format."""

from xinslm.tokenizer.chat import CHATML as OWN

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a {{ '{{' }}test{{ '}}' }} "
    "robot.<|im_end|>\n{% endif %}" + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA31 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: DATE\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token + ' ' }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for m in turns %}" + _ALTERNATE + "{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + "
    "'[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}" + _ALTERNATE + "{% if loop.first and system is defined %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set content = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + "
    "'\n\n' %}{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages "
    "%}{% endif %}{% for m in turns %}" + _ALTERNATE + "{{ '<start_of_turn>' + ('model' if m.role "
    "== 'assistant' else m.role) + '\n' + (first if loop.first else '') }}{{ m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content }}"
    "<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
ODD = (
    "{% for m in messages %}{{ '{{' }}\u00a0\"\"\"{{ m.role }}:{{ ' {' }}{{ m.content.rstrip() }}"
    "\u200b{% endfor %}{% if add_generation_prompt %} {{ '\"' }}{% endif %}"
)

_RESULTS = (
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<result>\n' + m.content + '\n</result>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
_CALLS = (
    "{% for call in m.tool_calls or [] %}{% set call = call.function %}GAP"
    """{{ '<call>\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}"""
    "{{ '}\n</call>' }}{% endfor %}"
)
_LIST = (
    "{{ '# Tools\n\nCall {{these}}:\n<tools>' }}{% for tool in tools %}{{ '\n' }}"
    """{{ tool | tojson }}{% endfor %}{{ '\n</tools>\nas {"name": <name>}<|im_end|>\n' }}"""
)
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}"
    + _LIST
    + "{% elif messages[0].role == 'system' "
    "%}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content }}"
    + _CALLS.replace("GAP", "{% if not loop.first or m.content %}{{ '\n' }}{% endif %}")
    + "{{ '<|im_end|>\n' }}"
    + _RESULTS
    + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3 writes tools."""
HERMES_DEFAULT = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% else %}"
    "{% set system = 'Be of help.' %}{% endif %}{{ '<|im_start|>system\n' + system }}"
    "{% if tools %}{{ '\n\n' }}" + _LIST + "{% else %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) "
    "or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    + _CALLS.replace("GAP", "{{ '\n' }}")
    + "{{ '<|im_end|>\n' }}"
    + _RESULTS
    + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen2.5 does, with a default system message."""
_HEADER = "{{ '<|start_header_id|>ROLE<|end_header_id|>\n\n' }}"
LLAMA31_TOOLS = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ bos_token }}" + _HEADER.replace("ROLE", "system") + "{% if tools %}{{ 'Tools: yes\n' }}"
    "{% endif %}{{ 'Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}"
    "{% if tools %}{% set first = messages[0].content | trim %}{% set messages = messages[1:] %}"
    + _HEADER.replace("ROLE", "user")
    + """{{ 'Answer as {"name": function, "parameters": values}.\n\n' }}"""
    "{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}"
    "{{ first + '<|eot_id|>' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}" + _HEADER.replace("ROLE", "ipython") + "{{ m.content | tojson }}"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at once') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}" + _HEADER.replace("ROLE", "assistant") + "{{ "
    """'{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}' }}"""
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}" + _HEADER.replace("ROLE", "assistant") + "{% endif %}"
)
STRIPS_REASONING = HERMES.replace(
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content }}",
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}",
)
assert STRIPS_REASONING != HERMES
WITH_TOOLS = {
    "Hermes": HERMES,
    "Hermes, default system": HERMES_DEFAULT,
    "LLaMA 3.1": LLAMA31_TOOLS,
}
UNKNOWN_TOOLS = {
    "not JSON": (
        "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}" + CHATML,
        "does not write tools as JSON",
    ),
    "functions alone": (
        "{% for t in tools or [] %}{{ t.function | tojson }}\n{% endfor %}" + CHATML,
        "does not write tools as JSON",
    ),
    "behind the messages": (
        CHATML + "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}",
        "tools in front of the first user message",
    ),
    "no calls": (
        HERMES.replace(_CALLS.split("GAP")[0], "{% for call in [] %}"),
        "refuses or rewrites calls of tools",
    ),
    "results in capitals": (
        HERMES.replace("'\n<result>\n' + m.content", "'\n<result>\n' + m.content | upper"),
        "refuses or rewrites results",
    ),
    "sorted keys": (
        HERMES.replace("tool | tojson", "tool | tojson(sort_keys=true)"),
        "does not write tools as JSON",
    ),
}
"""Templates whose tools have no known form, and what is said."""

TEMPLATES = {
    "own": "{{ bos_token }}" + OWN,
    "ChatML": CHATML,
    "default system": DEFAULT_SYSTEM,
    "LLaMA 3": LLAMA3,
    "LLaMA 3.1": LLAMA31,
    "Mistral": MISTRAL,
    "Mistral, system last": MISTRAL_SYSTEM_LAST,
    "LLaMA 2": LLAMA2,
    "Zephyr": ZEPHYR,
    "Gemma": GEMMA,
    "DeepSeek": DEEPSEEK,
    "odd characters": ODD,
}
UNKNOWN = {
    "today's date": (
        "{{ strftime_now('%d %b %Y') }}" + CHATML,
        "it writes today's date",
    ),
    "upper case": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
        "changes the content|refuses the roles",
    ),
    "numbered": (
        "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}",
        "depends on the place",
    ),
    "last three": (
        "{% for m in messages[-3:] %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        "refuses the roles",
    ),
    "twice": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.content }}{% endfor %}",
        "more than once",
    ),
    "refuses all": ("{{ raise_exception('no') }}", "it refuses the roles user"),
}
"""Templates that pieces cannot describe, and what is said."""
