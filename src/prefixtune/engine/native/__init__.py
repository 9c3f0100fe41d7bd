"""Attention over the slots as compiled code, where this machine has a C++ compiler; without it, torch computes it."""

from __future__ import annotations

from prefixtune.engine.native.kernel import AttentionKernel, Span, load_kernel, make_spans

__all__ = ["AttentionKernel", "Span", "load_kernel", "make_spans"]
