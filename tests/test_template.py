from typing import get_args

import pytest

from p2pllm.config.run import Template
from p2pllm.data.template import LAYOUTS, Example, check_template, render, render_prompt
from p2pllm.errors import ChatTemplateMissing
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
BARE = Example("Name a colour.", "", "Blue.")
TOLD = Example("Name the colour.", "The sky is blue.", "Blue.")


def whole(template, example):
    return "".join(render(template, example, TOKENIZER))


def test_alpaca_has_the_three_known_headings():
    text = whole("alpaca", TOLD)
    assert text.endswith(
        "\n\n### Instruction:\nName the colour.\n\n### Input:\nThe sky is blue."
        "\n\n### Response:\nBlue."
    )


def test_without_a_context_there_is_no_heading_for_it():
    assert "Input" not in whole("alpaca", BARE)
    assert "Input" not in whole("dolly", BARE)


def test_dolly_closes_its_response_within_the_answer():
    prompt, answer = render("dolly", TOLD, TOKENIZER)
    assert prompt.endswith("\n\nInput:\nThe sky is blue.\n\n### Response:\n")
    assert answer == "Blue.\n\n### End"


def test_llama2_puts_the_question_between_inst_marks():
    text = whole("llama2", TOLD)
    assert text.startswith("[INST] <<SYS>>\n")
    assert text.endswith("\n<</SYS>>\n\nName the colour.\n\nThe sky is blue. [/INST] Blue.")


def test_a_blank_before_the_answer_belongs_to_the_answer():
    prompt, answer = render("llama2", BARE, TOKENIZER)
    assert prompt.endswith("[/INST]")
    assert answer == " Blue."


def test_chat_is_what_the_tokenizer_makes_of_a_conversation():
    prompt, answer = render("chat", TOLD, TOKENIZER)
    assert prompt == "<|user|>\nName the colour.\n\nThe sky is blue.<eos>\n<|assistant|>\n"
    assert answer == "Blue.<eos>"


def test_chat_survives_a_template_that_does_not_continue_its_own_prompt():
    thinker = byte_tokenizer(
        chat="{% for m in messages %}{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    assert render("chat", BARE, thinker) == ("Name a colour.;<think>", "Blue.")


def test_a_template_of_your_own_is_a_text():
    assert render("Q: {instruction}\nA: ", BARE, TOKENIZER) == ("Q: Name a colour.\nA:", " Blue.")
    closed = "Q: {instruction} ({context})\nA:{response}\n--"
    assert render(closed, TOLD, TOKENIZER) == (
        "Q: Name the colour. (The sky is blue.)\nA:",
        "Blue.\n--",
    )


def test_braces_in_templates_and_rows_are_only_text():
    template = '{"q": "{instruction}", "x": {context.__class__}}: {context}'
    example = Example("What is {context}?", "{instruction}", "{response}")
    assert render(template, example, TOKENIZER) == (
        '{"q": "What is {context}?", "x": {context.__class__}}: {instruction}',
        "{response}",
    )


@pytest.mark.parametrize("template", [*get_args(Template), "Q {instruction} A "])
def test_a_question_is_asked_as_it_was_in_training(template):
    asked = render_prompt(template, TOLD.instruction, TOLD.context, TOKENIZER)
    assert asked == render(template, TOLD, TOKENIZER)[0]


def test_every_template_that_the_configuration_names_exists():
    assert {*LAYOUTS, "chat"} == set(get_args(Template))
    for name in get_args(Template):
        check_template(name, TOKENIZER)


def test_chat_without_a_chat_template_is_a_letter():
    with pytest.raises(ChatTemplateMissing, match=r"data\.template=alpaca"):
        check_template("chat", byte_tokenizer(chat=None))
