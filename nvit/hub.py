"""The Hugging Face hub, under the name that users import: cards and uploads of snapshots. `nvit.load` downloads."""

from .integrations.card import model_card
from .integrations.hub import push_to_hub, write_card

__all__ = ["model_card", "push_to_hub", "write_card"]
