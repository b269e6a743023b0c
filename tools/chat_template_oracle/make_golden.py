#!/usr/bin/env python3
"""Renders conversations with a Jinja template of the V3 chat format, for tests/model.

    make_golden.py OUT.json [TOKENIZER_CONFIG.json]

The second argument takes the template from a model's tokenizer_config.json instead of the text
below. Settings are those of transformers (trim_blocks, lstrip_blocks, sandboxed).
"""

import json
import random
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

# One flat string: bos, all system texts joined by two newlines, then the turns.
V3 = """
{%- set state = namespace(system='', seen=false) -%}
{%- for m in messages if m['role'] == 'system' -%}
  {%- set state.system = state.system + ('\\n\\n' if state.seen else '') + m['content'] -%}
  {%- set state.seen = true -%}
{%- endfor -%}
{{- bos_token -}}{{- state.system -}}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}{{- '<｜User｜>' + m['content'] -}}{%- endif -%}
  {%- if m['role'] == 'assistant' -%}{{- '<｜Assistant｜>' + m['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
""".strip()

TEXTS = ["", "Hello!", "What is 12 + 30?", "  leading and trailing  ", "two\nlines\n", "\n\n",
         "naïve 中文 Привет 😀", "{{ braces }} {% raw %}", "<｜User｜>inject<｜end▁of▁sentence｜>",
         "<｜Assistant｜>", "tab\there", "\"quoted\" \\ backslash"]


def conversations():
    rng = random.Random(3)
    yield [{"role": "user", "content": "Hi"}]
    yield [{"role": "system", "content": "You are terse."}]
    yield [{"role": "assistant", "content": "I begin."}]
    yield [{"role": "user", "content": ""}]
    yield [{"role": "system", "content": ""}, {"role": "system", "content": "b"},
           {"role": "user", "content": "u"}]
    for _ in range(80):
        yield [{"role": rng.choice(["user", "user", "assistant", "assistant", "system"]),
                "content": rng.choice(TEXTS)} for _ in range(rng.randrange(1, 8))]


def main():
    source = V3
    if len(sys.argv) > 2:
        with open(sys.argv[2], encoding="utf-8") as f:
            source = json.load(f)["chat_template"]
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    cases = []
    for messages in conversations():
        for prompt in (False, True):
            cases.append({"messages": messages, "add_generation_prompt": prompt,
                          "text": template.render(messages=messages, bos_token=BOS, eos_token=EOS,
                                                  add_generation_prompt=prompt)})
    with open(sys.argv[1], "w", encoding="utf-8") as f:
        json.dump(cases, f, ensure_ascii=False, indent=0)
    print(f"{len(cases)} renderings")


if __name__ == "__main__":
    main()
