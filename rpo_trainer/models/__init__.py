"""Models: loading, unwrapping, adapters, sharding, checks, reward models."""
