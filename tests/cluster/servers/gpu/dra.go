package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	resource "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/dynamic-resource-allocation/kubeletplugin"
	"k8s.io/dynamic-resource-allocation/resourceslice"
)

// Driver offers the devices of a State in ResourceSlices, and hands a container its own by CDI: a specification for each
// claim, with the mounts of the State.
type Driver struct {
	name, node, variable, file, folder string
}

// PrepareResourceClaims writes the specification that the container's runtime reads.
func (d *Driver) PrepareResourceClaims(_ context.Context, claims []*resource.ResourceClaim) (map[types.UID]kubeletplugin.PrepareResult, error) {
	results := map[types.UID]kubeletplugin.PrepareResult{}
	for _, claim := range claims {
		devices := []kubeletplugin.Device{}
		names := []string{}
		for _, given := range claim.Status.Allocation.Devices.Results {
			if given.Driver == d.name {
				names = append(names, given.Device)
				devices = append(devices, kubeletplugin.Device{
					Requests: []string{given.Request}, PoolName: given.Pool, DeviceName: given.Device,
					CDIDeviceIDs: []string{d.name + "/claim=" + string(claim.UID)},
				})
			}
		}
		log.Printf("%s: prepares %v for %s/%s", d.name, names, claim.Namespace, claim.Name)
		results[claim.UID] = kubeletplugin.PrepareResult{Devices: devices, Err: d.write(claim.UID, names)}
	}
	return results, nil
}

func (d *Driver) write(claim types.UID, devices []string) error {
	state, err := readState(d.file)
	if err != nil {
		return err
	}
	mounts := []map[string]any{}
	for _, path := range state.Mounts {
		options := []string{"ro", "rbind", "rprivate", "nosuid", "nodev"}
		mounts = append(mounts, map[string]any{"hostPath": path, "containerPath": path, "options": options})
	}
	edits := map[string]any{"env": []string{d.variable + "=" + strings.Join(devices, ",")}, "mounts": mounts}
	device := map[string]any{"name": string(claim), "containerEdits": edits}
	text, err := json.Marshal(map[string]any{"cdiVersion": "0.6.0", "kind": d.name + "/claim", "devices": []any{device}})
	if err != nil {
		return err
	}
	return os.WriteFile(d.specification(claim), text, 0o644)
}

func (d *Driver) specification(claim types.UID) string {
	return filepath.Join(d.folder, fmt.Sprintf("%s-%s.json", d.name, claim))
}

// UnprepareResourceClaims takes the specification away.
func (d *Driver) UnprepareResourceClaims(_ context.Context, claims []kubeletplugin.NamespacedObject) (map[types.UID]error, error) {
	results := map[types.UID]error{}
	for _, claim := range claims {
		log.Printf("%s: takes back what %s/%s had", d.name, claim.Namespace, claim.Name)
		results[claim.UID] = nil
		if err := os.Remove(d.specification(claim.UID)); !os.IsNotExist(err) {
			results[claim.UID] = err
		}
	}
	return results, nil
}

func (d *Driver) HandleError(_ context.Context, err error, message string) {
	log.Printf("%s: %s: %v", d.name, message, err)
}

func (d *Driver) WatchHealthStatus(context.Context, chan<- kubeletplugin.DeviceHealthReport) error {
	return kubeletplugin.ErrHealthNotSupported
}

// The devices that are well, as one pool of the node.
func (d *Driver) resources() (resourceslice.DriverResources, error) {
	state, err := readState(d.file)
	kind := "gpu"
	devices := []resource.Device{}
	for _, name := range slices.Sorted(maps.Keys(state.Devices)) {
		if state.Devices[name] == "Healthy" {
			attributes := map[resource.QualifiedName]resource.DeviceAttribute{"type": {StringValue: &kind}}
			devices = append(devices, resource.Device{Name: name, Attributes: attributes})
		}
	}
	pool := resourceslice.Pool{Slices: []resourceslice.Slice{{Devices: devices}}}
	return resourceslice.DriverResources{Pools: map[string]resourceslice.Pool{d.node: pool}}, err
}

// Registers the driver with the kubelet, and says which devices there are whenever that changes.
func driveDevices(arguments []string) error {
	flags := flag.NewFlagSet("driver", flag.ExitOnError)
	driver := &Driver{}
	kubeconfig := flags.String("kubeconfig", "", "of an account that may write the node's ResourceSlices")
	kubelet := flags.String("kubelet", "/var/lib/kubelet", "the kubelet's folder")
	flags.StringVar(&driver.name, "name", "gpu.gpuml.test", "of the driver")
	flags.StringVar(&driver.node, "node", "", "its name")
	flags.StringVar(&driver.variable, "variable", "NVIDIA_VISIBLE_DEVICES", "of a container's environment, for its devices")
	flags.StringVar(&driver.file, "state", "state.json", "devices and mounts, as JSON")
	flags.StringVar(&driver.folder, "cdi", "/var/run/cdi", "where the container's runtime looks for specifications")
	flags.Parse(arguments)
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	data := filepath.Join(*kubelet, "plugins", driver.name)
	for _, folder := range []string{data, driver.folder} {
		if err := os.MkdirAll(folder, 0o750); err != nil {
			return err
		}
	}
	ctx := context.Background()
	helper, err := kubeletplugin.Start(ctx, driver, kubeletplugin.DriverName(driver.name), kubeletplugin.NodeName(driver.node),
		kubeletplugin.KubeClient(client), kubeletplugin.PluginDataDirectoryPath(data),
		kubeletplugin.RegistrarDirectoryPath(filepath.Join(*kubelet, "plugins_registry")))
	if err != nil {
		return err
	}
	defer helper.Stop()
	for said := ""; ; time.Sleep(interval) {
		resources, err := driver.resources()
		if err != nil {
			return err
		}
		if text := fmt.Sprint(resources); text != said {
			said = text
			if err := helper.PublishResources(ctx, resources); err != nil {
				return err
			}
		}
	}
}
