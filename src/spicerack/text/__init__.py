"""From files, chats and data sets to tokens."""
