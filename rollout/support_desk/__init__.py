"""The demo's task: the support desk of Quillmere, an invented broadband and appliance company."""
