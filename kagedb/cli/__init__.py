"""The `kaged` command."""
