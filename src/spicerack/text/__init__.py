"""From files, chats and data sets to tokens: whatever reads text for calibration, training or evaluation."""
