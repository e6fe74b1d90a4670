"""Texts of the alphabet that the tests' tokenizer of letters knows."""

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or m.tool_calls[0].name }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz <>\n"
CHAT = [{"role": "user", "content": "which of them"}]


def draw(rng, least=1):
    """A text; every other one begins so that its first letter joins a prompt's last one."""
    return str(rng.choice(["b", ""])) + "".join(rng.choice([*LETTERS[:26]], rng.integers(least, 9)))
