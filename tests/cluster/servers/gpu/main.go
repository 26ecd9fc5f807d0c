// GPUs of the tests' real nodes, offered to a kubelet as their vendor's programs would: `gpu-plugin plugin`, a device plugin,
// and `gpu-plugin driver`, a driver for Dynamic Resource Allocation.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const interval = 200 * time.Millisecond

var commands = map[string]func(arguments []string) error{"plugin": offerDevices, "driver": driveDevices}

func main() {
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		log.Fatalf("usage: %s COMMAND FLAGS…", os.Args[0])
	}
	log.Fatal(commands[os.Args[1]](os.Args[2:]))
}

// State is read again whenever it is needed: devices by id with "Healthy" or "Unhealthy", and folders or files of the
// host that a container finds at the same place, read-only.
type State struct {
	Devices map[string]string `json:"devices"`
	Mounts  []string          `json:"mounts"`
}

type Plugin struct {
	api.UnimplementedDevicePluginServer
	resource, variable, file string
}

func readState(file string) (state State, err error) {
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &state)
	}
	return state, err
}

func (p *Plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

// ListAndWatch says which devices there are, and says it again when that changes.
func (p *Plugin) ListAndWatch(_ *api.Empty, stream grpc.ServerStreamingServer[api.ListAndWatchResponse]) error {
	for said := ""; stream.Context().Err() == nil; time.Sleep(interval) {
		state, err := readState(p.file)
		if err != nil {
			return err
		}
		devices := []*api.Device{}
		for id, health := range state.Devices {
			devices = append(devices, &api.Device{ID: id, Health: health})
		}
		slices.SortFunc(devices, func(a, b *api.Device) int { return strings.Compare(a.ID, b.ID) })
		text, _ := json.Marshal(devices)
		if string(text) == said {
			continue
		}
		said = string(text)
		log.Printf("%s: %s", p.resource, said)
		if err := stream.Send(&api.ListAndWatchResponse{Devices: devices}); err != nil {
			return err
		}
	}
	return nil
}

func (p *Plugin) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	state, err := readState(p.file)
	response := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		log.Printf("%s: allocates %v", p.resource, container.DevicesIds)
		answer := &api.ContainerAllocateResponse{Envs: map[string]string{p.variable: strings.Join(container.DevicesIds, ",")}}
		for _, path := range state.Mounts {
			answer.Mounts = append(answer.Mounts, &api.Mount{HostPath: path, ContainerPath: path, ReadOnly: true})
		}
		response.ContainerResponses = append(response.ContainerResponses, answer)
	}
	return response, err
}

// Registers the plugin with the kubelet, and again when the kubelet has started anew, for which it empties the folder.
func offerDevices(arguments []string) error {
	flags := flag.NewFlagSet("plugin", flag.ExitOnError)
	folder := flags.String("folder", api.DevicePluginPath, "where the kubelet's socket is")
	plugin := &Plugin{}
	flags.StringVar(&plugin.resource, "resource", "nvidia.com/gpu", "")
	flags.StringVar(&plugin.variable, "variable", "NVIDIA_VISIBLE_DEVICES", "of a container's environment, for its devices")
	flags.StringVar(&plugin.file, "state", "state.json", "devices and mounts, as JSON")
	flags.Parse(arguments)
	name := strings.NewReplacer("/", "-", ".", "-").Replace(plugin.resource) + ".sock"
	for {
		if err := plugin.serve(*folder, name); err != nil {
			log.Print(err)
		}
		time.Sleep(interval)
	}
}

func (p *Plugin) serve(folder, name string) error {
	socket, registry := filepath.Join(folder, name), filepath.Join(folder, "kubelet.sock")
	if _, err := os.Stat(registry); err != nil { // it removes sockets of others before it makes its own
		return err
	}
	os.Remove(socket)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	defer server.Stop()
	api.RegisterDevicePluginServer(server, p)
	go server.Serve(listener)
	kubelet, err := grpc.NewClient("unix://"+registry, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer kubelet.Close()
	request := &api.RegisterRequest{Version: api.Version, Endpoint: name, ResourceName: p.resource}
	if _, err := api.NewRegistrationClient(kubelet).Register(context.Background(), request, grpc.WaitForReady(true)); err != nil {
		return err
	}
	for err == nil {
		time.Sleep(interval)
		_, err = os.Stat(socket)
	}
	return nil
}
