"""What needs engines, devices or processes of its own."""
