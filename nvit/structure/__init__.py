"""What has left a model: masks, compact copies, snapshots and run states on disk."""
