"""Networks that tests share: ``zoo``, one for each kind of structure; ``outside``, by others."""
