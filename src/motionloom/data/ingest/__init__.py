"""From a folder or an archive of clips to manifest entries."""

from motionloom.data.ingest.folder import ingest, summary

__all__ = ["ingest", "summary"]
