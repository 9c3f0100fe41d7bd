"""A chat template whose turns end with a special token that is not the end token."""

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
