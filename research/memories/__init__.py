"""Memories of documents: how many answers survive when they are joined."""
