"""Problems and graders."""
