"Every kernel of the dev image knows %gpu_train and %submit_prod from the start"

c = get_config()  # noqa: F821  IPython gives it to a config file
c.InteractiveShellApp.extensions = ["gpuml"]
