"""A prefix for llama.cpp: a saved sequence state, which `llama-server` restores into a slot, and a check that it is in
effect.

    export   from a prefix to the files
    state    the bytes of a state file
    check    the script that is exported with the files; it needs nothing but Python
"""
