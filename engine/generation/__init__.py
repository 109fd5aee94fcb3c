"""Generating texts: sessions, their caches and files, and the loop from a prompt to pieces.

    session        the state of one conversation; what all sessions of a model share is its Host
    generation     the loop from a prompt to pieces (piece, options, asynchronous), each picked by a sampler
    scheduler      one step for many generations: it alone runs the runtime's steps
    guide          what the tokens may be, by a grammar (answer_rules), and which are known beforehand
    guesses        tokens that are checked several at a time: lookup, draft, draft_layers (draft_loading)
    token_cache    the KV cache of a session, with its tokens
    prefixes       what was computed of texts that are over, for those that begin alike; disk_prefixes, session_file
    adapters       those that a generation asks for
    diffusion      texts that are filled in, and not written one token after the other
"""
