"""Intents of spoken commands for the home, drawn from templates."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

from hassil.expression import (
    Alternative,
    Expression,
    Group,
    ListReference,
    Permutation,
    RuleReference,
    Sentence,
    TextChunk,
)
from hassil.intents import Intents, RangeSlotList, SlotList, TextSlotList
from hassil.recognize import recognize_all

from study.data import sources
from study.data.strings import collapse, in_language
from study.data.tasks.task import Splits, Task, empty_splits, fraction
from study.files import StudyError

#: Intents with at least ten distinct strings in each of the languages.
INTENTS = (
    "HassCancelAllTimers",
    "HassCancelTimer",
    "HassClimateGetTemperature",
    "HassClimateSetTemperature",
    "HassLightSet",
    "HassMediaNext",
    "HassMediaPause",
    "HassMediaUnpause",
    "HassStartTimer",
    "HassTimerStatus",
    "HassTurnOff",
    "HassTurnOn",
)

#: Strings drawn per intent.
COMMANDS = {"train": 60, "development": 20, "test": 25}

#: Language -> names that a user could have given to rooms and devices, in the same order everywhere.
SLOTS = {
    language: {"area": names[:3], "name": names[3:]}
    for language, names in {
        "en": ["kitchen", "bedroom", "living room", "television", "radio", "lamp"],
        "ar": ["المطبخ", "غرفة النوم", "غرفة المعيشة", "التلفاز", "الراديو", "المصباح"],
        "bg": ["кухня", "спалня", "хол", "телевизор", "радио", "лампа"],
        "de": ["Küche", "Schlafzimmer", "Wohnzimmer", "Fernseher", "Radio", "Lampe"],
        "el": ["κουζίνα", "κρεβατοκάμαρα", "σαλόνι", "τηλεόραση", "ραδιόφωνο", "λάμπα"],
        "es": ["cocina", "dormitorio", "salón", "televisor", "radio", "lámpara"],
        "fr": ["cuisine", "chambre", "salon", "téléviseur", "radio", "lampe"],
        "hi": ["रसोई", "शयनकक्ष", "बैठक", "टीवी", "रेडियो", "लैंप"],
        "ru": ["кухня", "спальня", "гостиная", "телевизор", "радио", "лампа"],
        "th": ["ห้องครัว", "ห้องนอน", "ห้องนั่งเล่น", "โทรทัศน์", "วิทยุ", "โคมไฟ"],
        "vi": ["phòng bếp", "phòng ngủ", "phòng khách", "tivi", "đài", "đèn bàn"],
        "zh": ["厨房", "卧室", "客厅", "电视", "收音机", "台灯"],
    }.items()
}

#: A language's expansion rules by name.
Rules = dict[str, Sentence]


def load_intents(languages: Iterable[str] | None = None) -> Splits:
    """Spoken commands for the home and what they are for, drawn from the templates of Home Assistant.

    Of the templates of each intent in English a quarter is for test, a fifth for development (at least one each), the
    rest for training, by a hash of the template; those of the other languages are all for test. COMMANDS strings per
    intent and split are drawn from its templates in turn, or fewer where there are not as many. None occurs twice in a
    language, case aside, and none that the library's own recogniser reads as more than one of the intents is kept.

    Names of rooms and devices, which a user of the program chooses, are those of SLOTS; templates with other open slots
    (floors, names of timers) are left out. Numbers are written in digits. Words are not inflected to fit a name, as the
    program itself does not. Source: this study's choice.

    Args:
        languages: other languages to draw from; by default all of SLOTS.

    Raises:
        StudyError: a language without data; or see :func:`study.data.sources.fetch`.
    """
    splits = empty_splits()
    others = [language for language in SLOTS if language != "en"] if languages is None else languages
    for language in ("en", *others):
        commands = _Commands(language)
        for intent in INTENTS:
            templates = sorted(commands.templates[intent], key=fraction)
            shares = {in_language("test", language): templates}
            if language == "en":
                test, development = (max(1, round(share * len(templates))) for share in (0.25, 0.2))
                shares = {
                    "test": templates[:test],
                    "development": templates[test : test + development],
                    "train": templates[test + development :],
                }
            for split, share in shares.items():
                drawn = commands.draw(intent, share, COMMANDS[split.partition("-")[0]])
                splits.setdefault(split, []).extend({"text": text, "label": intent} for text in drawn)
    return splits


class _Commands:
    """The templates of one language: ``templates[intent]`` are their texts."""

    def __init__(self, language: str):
        if language not in SLOTS:
            raise StudyError(f"intents: no commands in {language!r}; allowed: {', '.join(SLOTS)}")
        file = f"home_assistant_intents/data/{'zh-CN' if language == 'zh' else language}.json"
        content = json.loads(sources.read_member("home-assistant-intents", file))
        content["intents"] = {intent: content["intents"][intent] for intent in INTENTS}
        self.language = language
        self.intents = Intents.from_dict(content)
        for intent in self.intents.intents.values():
            for block in intent.data:  # whatever the devices are and wherever the user stands
                block.requires_context.clear()
                block.excludes_context.clear()
        self.slots: dict[str, SlotList] = dict(self.intents.slot_lists)
        self.slots |= {name: TextSlotList.from_strings(values) for name, values in SLOTS[language].items()}
        self.templates = {name: self._templates(name) for name in self.intents.intents}
        self.drawn: set[str] = set()

    def draw(self, intent: str, templates: list[str], count: int) -> list[str]:
        """At most ``count`` strings of the templates, none of which any call has returned before."""
        generator = random.Random(f"{self.language} {intent} {templates[0]}")
        strings: list[str] = []
        for attempt in range(10 * count):
            sentence, rules = self.templates[intent][templates[attempt % len(templates)]]
            text = collapse(self._string(sentence.expression, rules, generator) or "")
            if text.casefold() not in self.drawn and len(strings) < count:
                self.drawn.add(text.casefold())
                if self.readings(text) == {intent}:
                    strings.append(text)
        return strings

    def readings(self, text: str) -> set[str]:
        """The intents that the library recognises in a text."""
        slots = self.slots | {"floor": TextSlotList.from_strings([])}
        return {reading.intent.name for reading in recognize_all(text, self.intents, slot_lists=slots)}

    def _templates(self, intent: str) -> dict[str, tuple[Sentence, Rules]]:
        """Text -> the parsed template and the rules it may use, of those whose slots all have values."""
        templates: dict[str, tuple[Sentence, Rules]] = {}
        for block in self.intents.intents[intent].data:
            rules = self.intents.expansion_rules | block.expansion_rules
            for sentence in block.sentences:
                if self._string(sentence.expression, rules, random.Random(0)) is not None:
                    templates.setdefault(str(sentence.text), (sentence, rules))
        return templates

    def _string(self, expression: Expression, rules: Rules, generator: random.Random) -> str | None:
        """One string at random, None where a slot has no values.

        The library parses templates, and recognises what they spell, but can only list their strings one after the
        other: up to many millions for one template, of which the first differ in the last word alone.
        """
        if isinstance(expression, TextChunk):
            return expression.original_text
        if isinstance(expression, RuleReference):
            return self._string(rules[expression.rule_name].expression, rules, generator)
        if isinstance(expression, ListReference):
            values = self.slots.get(expression.list_name)
            if isinstance(values, RangeSlotList):
                return str(generator.choice(list(values.get_numbers())))
            if isinstance(values, TextSlotList):
                return self._string(generator.choice(values.values).text_in, rules, generator)
            return None
        assert isinstance(expression, Group)
        if isinstance(expression, Alternative):
            choices = generator.sample(expression.items, len(expression.items))
            drawn = (self._string(item, rules, generator) for item in choices)
            return next((string for string in drawn if string is not None), None)
        strings = [self._string(item, rules, generator) for item in expression.items]
        if isinstance(expression, Permutation):
            generator.shuffle(strings)
        known = [string for string in strings if string is not None]
        return "".join(known) if len(known) == len(strings) else None


TASKS = (
    Task(
        name="intents",
        loader=load_intents,
        labels=INTENTS,
        metric="accuracy",
        metrics=("accuracy", "macro_f1"),
        pair=False,
        citation="sentence templates of Home Assistant, package home-assistant-intents",
        languages=tuple(SLOTS),
    ),
)
