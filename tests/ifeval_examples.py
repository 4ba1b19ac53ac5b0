"""For each of IFEval's 25 types: arguments, a response that follows, one that does not.

Written by hand after the paper's Table 4; the reason is beside each one that is not plain. Types
that need a language are in `LANGUAGE_EXAMPLES`.
"""

from typing import Any

Example = tuple[dict[str, Any], str, str]
AT_LEAST, LESS_THAN = "at least", "less than"

EXAMPLES: dict[str, Example] = {
    "keywords:existence": ({"keywords": ["fox", "dog"]}, "A FOX met two dogs.", "A fox met a cat."),
    "keywords:frequency": (
        {"keyword": "tea", "frequency": 2, "relation": AT_LEAST},
        "Tea for me, steak for you.",  # tea, s-tea-k: 2
        "Tea for two.",  # 1
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["rock", "ice"]}, "A rocket.", "A Rock!"),
    "keywords:letter_frequency": (
        {"letter": "e", "let_frequency": 3, "let_relation": LESS_THAN},
        "Even",  # 2
        "Eleven",  # 3
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": AT_LEAST},
        "Dr. Who came. Why? Nobody knows.",  # 3
        "Dr. Who came. Nobody knows.",  # 2
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        "***\nOne.\n***\nTwo.",  # the first part is blank
        "One.\n***\n\n***\nTwo.",  # a blank part in the middle
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": LESS_THAN},
        "twenty-one men",  # 3: a hyphen divides
        "one two, three; four",  # 4
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "However"},
        "Yes.\n\n'however, no.",
        "However, yes.\n\nNo.",
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        "Dear [name], meet me at [place].",
        "Dear [name], meet me at (place).",
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        "Bye.\np. s. Milk!",
        "Bye. PS",
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        "* one\n - two",
        "* one\n- two\n- three",
    ),
    "detectable_format:constrained_response": ({}, " My answer is no. ", "My answer is No."),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "*a* and **b**",  # the single pattern finds *a* and, in "**b**", two blanks; the double b
        "*a* and ** **",
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1 a Section2 b",
        "Section 1 a Section B b",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', '{"a": [1}'),
    "detectable_format:title": ({}, "<<Joy>>\nA poem.", "<< >>\nA poem."),
    "combination:two_responses": ({}, "Yes.\n******\nNo.", "Yes.\n******\nYes."),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say Hi. "},
        "\nsay hi. Hi!",
        "You said: say hi. Hi!",
    ),
    "startend:end_checker": ({"end_phrase": "The End."}, '"All died. the end."', "The End. Bye."),
    "startend:quotation": ({}, ' "Yes" ', '"Yes'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 3, "capital_relation": AT_LEAST},
        "I DON'T know.",  # I, DO, N'T
        "I don't KNOW.",  # I, KNOW
    ),
    "punctuation:no_comma": ({}, "Yes; no.", "Yes, no."),
}

LANGUAGE_EXAMPLES: dict[str, Example] = {
    "language:response_language": (
        {"language": "de"},
        "Der Hund schläft heute den ganzen Tag unter dem alten Tisch.",
        "The dog sleeps under the old table all day long.",
    ),
    "change_case:english_capital": (
        {},
        "THIS IS WHAT WE THINK ABOUT THE WEATHER: IT IS GOING TO RAIN.",
        "THIS IS WHAT WE THINK ABOUT THE WEATHER: IT IS GOING TO RAiN.",
    ),
    "change_case:english_lowercase": (
        {},
        "the dog sleeps under the old table all day long.",
        "der hund schläft heute den ganzen tag unter dem alten tisch.",
    ),
}
