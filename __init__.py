"""keelback."""
