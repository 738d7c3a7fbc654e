"""The other systems of the paper's comparison. RIVAL and IP-Adapter are presets of the loop (methods.py); these three
have networks of their own. Nothing in the core imports from here."""
