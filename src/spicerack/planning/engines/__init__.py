"""Engines, a file each, which declares `ENGINE` (`planning.engine.Engine`)."""
