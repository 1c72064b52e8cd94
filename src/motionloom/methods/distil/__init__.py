"""Distillation: a teacher of many steps into a student of few."""
