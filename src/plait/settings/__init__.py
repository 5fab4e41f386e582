"""What a user may choose, checked once; below `cli` nobody knows of settings.

tree.py      the tree: one frozen class a section, each field with unit, bounds and a sentence
load.py      file, then environment, then flags, into a tree; errors that name the source
cluster_file.py  a model, its gateway and its workers in one file, for `plait up`
describe.py  the reference page of the documentation, and the settings in effect
"""

from plait.settings.cluster_file import Cluster, ClusterWorker, read_cluster
from plait.settings.describe import describe_settings, settings_page, show_default
from plait.settings.load import FlagValues, Tree, load_settings, settings_from
from plait.settings.tree import SECTIONS, SettingFacts, Settings, setting_facts

__all__ = [
    "SECTIONS",
    "Cluster",
    "ClusterWorker",
    "FlagValues",
    "SettingFacts",
    "Settings",
    "Tree",
    "describe_settings",
    "load_settings",
    "read_cluster",
    "setting_facts",
    "settings_from",
    "settings_page",
    "show_default",
]
