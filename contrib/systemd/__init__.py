"""The systemd units that `kaged systemd` writes; installed as kagedb.systemd."""
