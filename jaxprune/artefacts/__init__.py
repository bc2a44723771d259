"""Models on disk: one file each, switched in one step, with a digest; nothing runs on reading."""
