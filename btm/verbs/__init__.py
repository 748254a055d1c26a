"""One module per command, each with ``main(config)``; imported only when its command is called."""
