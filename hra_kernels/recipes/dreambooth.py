"""DreamBooth's 30 subjects and 25 prompts for each, as the authors' scripts number them (`class_idx`, `prompt_idx`)."""

from dataclasses import dataclass

from hra_kernels.recipes import RecipeError

TOKEN = "qwe"

_FOLDERS = [
    *("backpack", "backpack_dog", "bear_plushie", "berry_bowl", "can", "candle", "cat", "cat2", "clock"),
    *("colorful_sneaker", "dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8", "duck_toy", "fancy_boot"),
    *("grey_sloth_plushie", "monster_toy", "pink_sunglasses", "poop_emoji", "rc_car", "red_cartoon", "robot_toy"),
    *("shiny_sneaker", "teapot", "vase", "wolf_plushie"),
]
_NOUNS = {
    "backpack_dog": "backpack",
    "bear_plushie": "stuffed animal",
    "berry_bowl": "bowl",
    "cat2": "cat",
    "colorful_sneaker": "sneaker",
    "duck_toy": "toy",
    "fancy_boot": "boot",
    "grey_sloth_plushie": "stuffed animal",
    "monster_toy": "toy",
    "pink_sunglasses": "glasses",
    "poop_emoji": "toy",
    "rc_car": "toy",
    "red_cartoon": "cartoon",
    "robot_toy": "toy",
    "shiny_sneaker": "sneaker",
    "wolf_plushie": "stuffed animal",
}
_PLACES = [
    *("a {} in the jungle", "a {} in the snow", "a {} on the beach", "a {} on a cobblestone street"),
    *("a {} on top of pink fabric", "a {} on top of a wooden floor", "a {} with a city in the background"),
    *("a {} with a mountain in the background", "a {} with a blue house in the background"),
    "a {} on top of a purple rug in a forest",
]
_OF_OBJECTS = [
    *("a {} with a wheat field in the background", "a {} with a tree and autumn leaves in the background"),
    *("a {} with the Eiffel Tower in the background", "a {} floating on top of water"),
    *("a {} floating in an ocean of milk", "a {} on top of green grass with sunflowers around it"),
    *("a {} on top of a mirror", "a {} on top of the sidewalk in a crowded street"),
    *("a {} on top of a dirt road", "a {} on top of a white rug"),
]
_OF_LIVE_ONES = [
    *("a {} wearing a red hat", "a {} wearing a santa hat", "a {} wearing a rainbow scarf"),
    *("a {} wearing a black top hat and a monocle", "a {} in a chef outfit", "a {} in a firefighter outfit"),
    *("a {} in a police outfit", "a {} wearing pink glasses", "a {} wearing a yellow shirt"),
    "a {} in a purple wizard outfit",
]
_LOOKS = ["a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}"]


@dataclass(frozen=True)
class Subject:
    folder: str
    noun: str

    @property
    def live(self) -> bool:
        return self.noun in ("cat", "dog")

    def prompts(self, token: str = "") -> list[str]:
        """Of which `prompt_idx` picks one; without a token they are the class's."""
        what = f"{token} {self.noun}".strip()
        middle = _OF_LIVE_ONES if self.live else _OF_OBJECTS
        return [text.format(what) for text in (*_PLACES, *middle, *_LOOKS)]


SUBJECTS = [Subject(folder, _NOUNS.get(folder, folder.rstrip("0123456789"))) for folder in _FOLDERS]


def picked(option: str, number: int, among: list):
    """Raises RecipeError if there is no such number."""
    if not 0 <= number < len(among):
        raise RecipeError(f"{option} {number}: expected 0 to {len(among) - 1}")
    return among[number]
