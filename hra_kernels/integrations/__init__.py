"""HRA for other trainers, through their plugin interfaces; each module needs the trainer that it is named after."""
