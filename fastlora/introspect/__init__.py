"""What must be known of somebody else's model: targets, names, taps, sharding."""
