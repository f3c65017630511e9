"""The numbered schema scripts; installed as kagedb.migrations. kagedb/schema.py runs them."""
