"""What a user may choose, checked once; below `cli` nobody knows of settings.

tree.py      the tree: one frozen class a section, each field with unit, bounds and a sentence
load.py      file, then environment, then flags, into a tree; errors that name the source
describe.py  the reference page of the documentation, and the settings in effect
"""

from plait.settings.describe import describe_settings, settings_page, show_default
from plait.settings.load import FlagValues, load_settings
from plait.settings.tree import SECTIONS, SettingFacts, Settings, setting_facts

__all__ = [
    "SECTIONS",
    "FlagValues",
    "SettingFacts",
    "Settings",
    "describe_settings",
    "load_settings",
    "setting_facts",
    "settings_page",
    "show_default",
]
