"""The main job: masks decision by decision, the runs around them, and their folder."""
