"""How safe and how useful a chat model is, measured from its answers."""
