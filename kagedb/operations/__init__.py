"""Whole-store work: what an operator does to a store rather than in it."""
